"""The command line: flags and their parser, the console, and the run of a command with its exit code."""
