"""``python -m matgptq``, as ``torchrun`` starts it."""

from matgptq.cli import main

if __name__ == "__main__":
    main()
