"""
The geometry of iflame_hf, without the torch and transformers that `import iflame_hf` imports.

iflame_hf imports both at once, since it registers its classes with transformers. Its modules of geometry need neither:
this module is a second package of the same files, so that `from iflame_cli.geometry.mesh_iflame import load_mesh`
takes no seconds. Classes, and so exceptions, are others than those of iflame_hf.
"""

from importlib.util import find_spec

__path__ = find_spec("iflame_hf").submodule_search_locations
