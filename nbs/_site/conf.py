"Sphinx's settings; build.py runs it."
import tomllib
from pathlib import Path
from urllib.parse import urlparse

here = Path(__file__).parent
project_ = tomllib.loads((here.parents[1]/"pyproject.toml").read_text(encoding="utf-8"))["project"]
project = html_title = project_["name"]
extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx.ext.githubpages",
              "sphinxext.opengraph", "sphinx_sitemap", "notfound.extension"]
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
html_baseurl = project_["urls"]["Documentation"]
html_static_path = ["static", "readme"]
html_css_files = ["book.css"]
html_logo = html_favicon = "static/logo.svg"
html_search_scorer = str(here/"search.js") # Sphinx looks for it in the working folder
html_show_sphinx = html_show_copyright = False
html_copy_source = False
ogp_site_url = html_baseurl
ogp_image = f"{html_baseurl}_static/1.png" # the picture of the front page
ogp_image_alt = "A task with one picture of each new class, and what the network answers"
ogp_enable_meta_description = True
ogp_social_cards = {"enable": False} # they need fonts
sitemap_url_scheme = "{link}"
sitemap_excludes = ["search.html", "genindex.html", "404.html"]
notfound_urls_prefix = urlparse(html_baseurl).path
notfound_context = {"title": "Page not found", "body": f"""<h1>Page not found</h1>
<p>There is no page at this address. Try the search, or <a href="{notfound_urls_prefix}">the front page</a>.</p>"""}

def without_code(app, doctree):
    "The search index holds what is written, and commands, but not code and what code prints."
    from docutils import nodes
    for o in doctree.findall(nodes.literal_block):
        if o.get("language") != "bash": o["classes"].append("no-search")

def setup(app): app.connect("doctree-read", without_code)
