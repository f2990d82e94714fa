"""The console entry: `raybge COMMAND ...` and `python -m raybge COMMAND ...`."""

from raybge.cli.run import main

if __name__ == "__main__":
    main()
