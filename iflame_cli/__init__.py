"""The `iflame` command. Its parser and errors need nothing heavy, so that --help answers at once."""
