"""One file per format that a slice is exported to; ``matgptq.exports.exporting`` drives them."""
