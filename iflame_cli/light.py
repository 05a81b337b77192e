"""
The modules of iflame_hf that need neither torch nor transformers, without the import of both.

`import iflame_hf` imports them, since it registers its classes with transformers. This module is a second package of
the same files, so that `from iflame_cli.light.mesh_iflame import load_mesh` takes no seconds. Classes, and so
exceptions, are others than those of iflame_hf.
"""

from importlib.util import find_spec

__path__ = find_spec("iflame_hf").submodule_search_locations
