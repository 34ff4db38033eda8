"Sphinx's settings; build.py runs it."
import tomllib
from pathlib import Path

project_ = tomllib.loads((Path(__file__).parents[2]/"pyproject.toml").read_text(encoding="utf-8"))["project"]
project = html_title = project_["name"]
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx.ext.githubpages"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm" # tables that a cell prints
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "attrs_inline", "deflist"]
myst_heading_anchors = 4
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_selector = "div.cell_input pre, div.highlight-bash pre"
copybutton_prompt_text = "$ "
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
