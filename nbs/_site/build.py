"""From the notebooks: `python nbs/_site/build.py` writes the site to `_docs/`, with `--readme` README.md and its pictures.

nbdev honours the `#|` options and finds the links; this script hands its notebooks to Sphinx: front matter becomes a heading, options
become tags, every exported symbol an entry that search and links find, and the pages a table of contents in the order of the book."""
import base64, importlib, inspect, json, os, re, shutil, sys, tomllib
from pathlib import Path

here = Path(__file__).resolve().parent
nbs, root = here.parent, here.parents[1]
urls = tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
parts = {"Learn": range(20), "Use": range(20, 30), "Compare and reproduce": range(30, 80), "Appendix": range(80, 100)}

def notebook(path): return json.loads(path.read_text(encoding="utf-8"))
def text(o): return o if isinstance(o, str) else "".join(o or ())
def page(path): return re.sub(r"^\d+_", "", path.stem)  # 03_data.episodes.ipynb is data.episodes.html, as in nbdev's own links

def options(source):
    "A cell's `#|` options, and its source without them."
    rows = source.splitlines()
    opts = dict(re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", o).groups() for o in rows if o.startswith("#|"))
    return opts, "\n".join(o for o in rows if not o.startswith("#|") and not re.search(r"#\|\s*hide_line\s*$", o)).strip("\n")

# Markdown: README.md, and beside each page its plain text

def outputs(cell, alt, picture):
    for o in cell["outputs"]:
        data = o.get("data", {})
        if "image/png" in data: yield picture(base64.b64decode(text(data["image/png"])), alt)
        elif "text/markdown" in data: yield text(data["text/markdown"])
        elif out := text(o.get("text") or data.get("text/plain")).rstrip(): yield f"```text\n{out}\n```"

def markdown(nb, picture=lambda png, alt: ""):
    "A notebook as Markdown; `picture` says how a PNG is shown."
    parts = []
    for cell in nb["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source)
        if cell["cell_type"] != "code": continue
        opts, source = options(source)
        if {"hide", "default_exp"} & opts.keys() or opts.get("include") == "false": continue
        if source and opts.get("echo") != "false": parts.append(f"```python\n{source}\n```")
        if opts.get("output") != "false": parts += outputs(cell, opts.get("fig-alt", ""), picture)
    return "\n\n".join(o.strip() for o in parts if o.strip()) + "\n"

def readme():
    "README.md's text and its pictures by path, both from index.ipynb."
    pictures = {}
    def picture(png, alt):
        name = f"nbs/_site/readme/{len(pictures) + 1}.png"
        pictures[name] = png
        return f"![{alt}]({name})"
    md = re.sub(r"\]\(([\w.]+\.ipynb)", r"](nbs/\1", markdown(notebook(nbs/"index.ipynb"), picture))
    return "<!-- made from nbs/index.ipynb by nbs/_site/build.py: edit the notebook -->\n\n" + md, pictures

# The site

def symbol(name, module):
    "The Python-domain entry of a symbol: `class`, `function`, `method` or `property`, with its signature."
    obj = module
    for o in name.split("."): obj = getattr(obj, o)
    if isinstance(obj, property): return f":::{{py:property}} {name}\n:module: {module.__name__}\n:::"
    kind = "class" if inspect.isclass(obj) else "method" if "." in name else "function"
    try: sig = inspect.signature(obj)
    except ValueError: sig = inspect.Signature()
    pars = [o.replace(annotation=o.empty) for o in sig.parameters.values()][kind == "method":]
    sig = re.sub(r"<[^>]*>", "...", str(sig.replace(parameters=pars, return_annotation=sig.empty)))
    return f":::{{py:{kind}}} {name}{sig}\n:module: {module.__name__}\n:::"

def site_cells(nb, path, names):
    "The cells of a notebook that nbdev has processed, as Sphinx wants them."
    md = lambda source: dict(cell_type="markdown", metadata={}, source=source)
    mod = re.search(r"^#\|\s*default_exp:?\s*([\w.]+)", "\n".join(text(c["source"]) for c in nb["cells"]), re.M)
    module = importlib.import_module(f"{names['lib']}.{mod[1]}") if mod else None
    cells = []
    for cell in nb["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "raw":
            if fm := re.match(r"---\n(.*?)\n---", source.strip(), re.S): cells.append(md(heading(fm[1], path, module)))
        elif cell["cell_type"] == "markdown": cells.append(md(links(source, names)))
        elif shown := re.search(r"^show_doc\(([\w.]+)", source, re.M):
            at = len(cells)  # the entries that nbdev adds after an exported cell stand before it, in the order of the source
            if cell.get("has_sd"): at -= 1
            while cell.get("has_sd") and cells[at-1]["source"].startswith(":::{py:"): at -= 1
            cells.insert(at, md(symbol(shown[1], module)))
        else:
            opts, source = options(source)
            if source: cells.append(code(cell, opts, source, names))
    return cells

def heading(front, path, module):
    import yaml
    fm, nb = yaml.safe_load(front), f"[{path.relative_to(root)}]({urls['Repository']}/blob/main/{path.relative_to(root)})"
    src = f" · module `{module.__name__}`" if module else ""
    return f"# {fm['title']}\n\n" + (f"{{.subtitle}}\n{fm['description']}\n\n" if "description" in fm else "") + f"{{.source}}\n{nb}{src}"

def links(source, names):
    "Links between pages, and nbdev's links to symbols, as Sphinx knows them."
    source = re.sub(r"\]\(\d+_([\w.]+\.ipynb)", r"](\1", source)
    source = re.sub(r"</summary>\n?(?=[^\n])", "</summary>\n\n", source)  # blank lines let Markdown be read inside <details>
    source = re.sub(r"(?<=[^\n])\n?([ \t]*</details>)", r"\n\n\1", source)
    own = re.escape(urls["Documentation"].rstrip("/")) + r"/([\w.]+\.html#[\w.]+)"
    return re.sub(rf"\[`([^`]+)`\]\({own}\)", lambda m: f"{{py:obj}}`{m[1]} <{names[m[2]]}>`" if m[2] in names else f"`{m[1]}`", source)

def code(cell, opts, source, names):
    tags = [f"nb-{o}" for o in opts if o.startswith("export")]
    if opts.get("echo") == "false": tags.append("remove-input")
    if opts.get("output") == "false": tags.append("remove-output")
    if opts.get("code-fold") == "true": tags.append("hide-input")
    outs = [dict(o) for o in cell["outputs"]]
    for o in outs:
        if "data" not in o: continue
        o["data"] = {k: v for k, v in o["data"].items() if "widget" not in k}  # a saved page has no kernel
        if "text/markdown" in o["data"]: o["data"]["text/markdown"] = links(text(o["data"]["text/markdown"]), names)
    meta = dict(tags=tags, mystnb=dict(image=dict(alt=opts.get("fig-alt", ""))))
    return dict(cell_type="code", metadata=meta, execution_count=None, outputs=outs, source=source)

def contents(paths):
    "The table of contents, in the order of the book."
    if taken := {"index", "search", "genindex", "py-modindex"} & {page(p) for p in paths}: raise SystemExit(f"the site has a page of its own called {min(taken)}: rename the notebook")
    def number(path): return int(re.match(r"\d+", path.stem)[0])
    groups = {name: [p for p in paths if number(p) in numbers] for name, numbers in parts.items()}
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {k}", "", *map(page, v), "```"]) for k, v in groups.items() if v)

def site():
    from nbdev.serve import proc_nbs
    from sphinx.cmd.build import main as sphinx
    proc = proc_nbs(force=True, n_workers=2)
    paths = sorted(nbs.glob("[0-9]*.ipynb"))
    idx = importlib.import_module(f"{lib()}._modidx").d["syms"]
    names = dict(lib=lib(), **{html: name for syms in idx.values() for name, (html, _) in syms.items()})
    work, out = proc/".site", root/"_docs"  # Sphinx and myst-nb leave folders beside their source and their target
    for o in (work, out): shutil.rmtree(o, ignore_errors=True)
    (work/"src").mkdir(parents=True)
    for p in [nbs/"index.ipynb", *paths]:
        cells = site_cells(notebook(proc/p.name), p, names)
        if p.stem == "index": cells.append(dict(cell_type="markdown", metadata={}, source=contents(paths)))
        nb = dict(cells=cells, metadata=dict(language_info=dict(name="python", pygments_lexer="ipython3")), nbformat=4, nbformat_minor=4)
        (work/"src"/f"{page(p)}.ipynb").write_text(json.dumps(nb))
    if err := sphinx(["-W", "--keep-going", "-q", "-c", str(here), "-d", str(work/"doctrees"), str(work/"src"), str(work/"html")]): sys.exit(err)
    shutil.move(work/"html", out)
    for p in [nbs/"index.ipynb", *paths]: (out/f"{page(p)}.html.md").write_text(markdown(notebook(p)), encoding="utf-8")
    from panel import add_panel
    add_panel(out)
    print(f"the site is in {out}/index.html")

def lib(): return tomllib.loads((root/"pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]

if __name__ == "__main__":
    os.chdir(root); sys.path.insert(0, str(root))
    if "--readme" in sys.argv:
        md, pictures = readme()
        shutil.rmtree(here/"readme", ignore_errors=True)
        if pictures: (here/"readme").mkdir()
        for name, png in pictures.items(): (root/name).write_bytes(png)
        (root/"README.md").write_text(md, encoding="utf-8")
    else: site()
