"""The verbs of the command line, one module each: `add_arguments(parser)` and `execute(args)`, its first docstring
line the help. No verb imports torch before it executes."""
