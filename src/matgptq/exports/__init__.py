"""One file per format that a slice is exported to; ``matgptq.exporting`` drives them."""
