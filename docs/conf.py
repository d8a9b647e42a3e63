"""Sphinx configuration: MyST pages, executed where they hold code cells, without a network."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The pages document this checkout, also where another flowsim is installed; the kernels of
# notebooks read PYTHONPATH.
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)
# A backend that is set already would keep the kernels from theirs, which puts figures into pages.
os.environ.pop("MPLBACKEND", None)

import flowsim  # noqa: E402

project = "flowsim"
author = "The flowsim authors"
copyright = "The flowsim authors"
version = release = flowsim.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "api_pages"]
root_doc = "index"
exclude_patterns = ["_build", "jupyter_execute"]
numfig = False

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_in_temp = True
nb_render_markdown_format = "myst"  # tables
nb_output_stderr = "remove"  # tqdm remarks on absent notebook widgets

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "flowsim"
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
}
