"""One module a subcommand: `add_arguments(parser)` and `run(args) -> exit status`.

Modules import only argparse and light parts of the engine at the top; torch inside `run`.
"""
