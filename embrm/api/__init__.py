"""The public API: one function for each command, and the objects that they return.

`import embrm` offers these names lazily (`embrm.sweep`, `embrm.open_cache`, ...). A path may be a
string or a `Path`, a spec a TOML file or a mapping with the same keys. Everything that a user can
put right raises `embrm.UserError`, whose text is the line that the command would print.
"""
