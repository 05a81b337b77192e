import sys

from iflame_cli.command_line import main

sys.exit(main())
