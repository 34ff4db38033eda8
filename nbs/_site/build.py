"""From the notebooks: `python nbs/_site/build.py` writes the site to `_docs/`, with `--readme` README.md and its pictures.

nbdev honours the `#|` options and finds the links; this script hands its notebooks to Sphinx: front matter becomes a heading, options
become tags, every exported symbol an entry with its parameters and its source, and the pages a table of contents in the order of the book."""
import base64, importlib, inspect, json, os, re, shutil, sys, tomllib
from pathlib import Path

here = Path(__file__).resolve().parent
nbs, root = here.parent, here.parents[1]
work = root/"_proc/.site"  # beside nbdev's processed notebooks
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
    "The Python-domain entry of a symbol: its signature, what it is, a table of its parameters, and a link to its source."
    obj = module
    for o in name.split("."): obj = getattr(obj, o)
    kind = "property" if isinstance(obj, property) else "class" if inspect.isclass(obj) else "method" if "." in name else "function"
    obj = inspect.unwrap(getattr(obj, "fget", obj))
    sig = "" if kind == "property" else signature(obj, kind)
    doc = inspect.cleandoc(obj.__doc__ or "")
    if doc.startswith(f"{name}("): doc = ""  # written by `dataclass`
    body = [doc, f"{{.api-source .no-search}}\n[source]({source_link(obj)})", parameters(obj)]
    return "\n\n".join([f":::{{py:{kind}}} {name}{sig}\n:module: {module.__name__}", *filter(None, body)]) + "\n:::"

def signature(obj, kind):
    try: sig = inspect.signature(obj)
    except ValueError: sig = inspect.Signature()
    pars = [o.replace(annotation=o.empty) for o in sig.parameters.values()][kind == "method":]
    return short(str(sig.replace(parameters=pars, return_annotation=sig.empty)))

def short(text):
    "A default or a signature without addresses and without the fields of long configs."
    def fields(m): return m[0] if len(m[0]) < 40 else f"{m[1]}(...)"
    return re.sub(r"\b([A-Z]\w+)\((?:[^()]|\([^()]*\))*\)", fields, re.sub(r"<[^>]*>", "...", text))

def source_link(obj):
    path = Path(inspect.getsourcefile(obj)).relative_to(root)
    return f"{urls['Repository']}/blob/main/{path.as_posix()}#L{inspect.getsourcelines(obj)[1]}"

def parameters(obj):
    "A Markdown table of name, type, default and meaning, from the docments; none for parameters that say nothing."
    from fastcore.docments import docments
    empty, rows = inspect.Parameter.empty, []
    for name, o in docments(obj, full=True).items():
        anno = "" if o.anno is empty else re.sub(r"[\w.]+\.(\w+)", r"\1", inspect.formatannotation(o.anno)).strip("'")
        default = "" if o.get("default", empty) is empty else short(repr(o.default))
        if name == "self" or not (anno or o.docment): continue
        cells = [f"`{name}`" if name != "return" else "returns", anno and f"`{anno}`", default and f"`{default}`", o.docment or ""]
        if name != "return" or o.docment or anno != "None": rows.append([" ".join(c.split()).replace("|", "\\|") for c in cells])
    head = [["name", "type", "default", "meaning"], ["--"] * 4]
    return "\n".join("| " + " | ".join(o) + " |" for o in head + rows) if rows else ""

def site_cells(nb, path, names):
    "The cells of a notebook that nbdev has processed, as Sphinx wants them."
    md = lambda source: dict(cell_type="markdown", metadata={}, source=source)
    mod = re.search(r"^#\|\s*default_exp:?\s*([\w.]+)", "\n".join(text(c["source"]) for c in nb["cells"]), re.M)
    module = importlib.import_module(f"{names['lib']}.{mod[1]}") if mod else None
    cells = []
    for cell in nb["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "raw":
            if fm := front(source): cells.append(md(heading(fm, path, module)))
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

def front(source):
    "The front matter of a raw cell."
    import yaml
    fm = re.match(r"---\n(.*?)\n---", source.strip(), re.S)
    return yaml.safe_load(fm[1]) if fm else {}

def heading(fm, path, module):
    "Title, subtitle, and the links that open the notebook."
    nb, github = path.relative_to(root).as_posix(), urls["Repository"]
    buttons = [f"[Open in Colab](https://colab.research.google.com/github/{github.split('github.com/')[-1]}/blob/main/{nb})",
               f"{{download}}`Download notebook <{os.path.relpath(path, work/'src')}>`", f"[GitHub]({github}/blob/main/{nb})"]
    if path.stem == "index": buttons = [f"[GitHub]({github})"]
    if module: buttons.append(f"module `{module.__name__}`")
    return f"# {fm['title']}\n\n" + (f"{{.subtitle}}\n{fm['description']}\n\n" if "description" in fm else "") + "{.source .no-search}\n" + " ".join(buttons)

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

def chapters(paths):
    "The pages of each part, in the order of the book."
    def number(path): return int(re.match(r"\d+", path.stem)[0])
    groups = {name: [p for p in paths if number(p) in numbers] for name, numbers in parts.items()}
    return {name: group for name, group in groups.items() if group}

def contents(paths):
    "The table of contents."
    if taken := {"index", "search", "genindex", "py-modindex"} & {page(p) for p in paths}: raise SystemExit(f"the site has a page of its own called {min(taken)}: rename the notebook")
    trees = {name: [page(p) for p in group] for name, group in chapters(paths).items()}
    trees.setdefault("Appendix", []).append("Index of names <genindex>")
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {k}", "", *v, "```"]) for k, v in trees.items())

def llms(home, about, paths):
    "`llms.txt`: every page by part, with a link to its Markdown."
    lines = [f"# {home['title']}", "", f"> {home['description']}"]
    for name, group in chapters(paths).items():
        lines += ["", f"## {name}", ""]
        lines += [f"- [{about[p]['title']}]({urls['Documentation']}{page(p)}.html.md): {about[p].get('description', '')}" for p in group]
    return "\n".join(lines) + "\n"

def site():
    from nbdev.serve import proc_nbs
    from sphinx.cmd.build import main as sphinx
    proc_nbs(force=True, n_workers=2)
    home, paths = nbs/"index.ipynb", sorted(nbs.glob("[0-9]*.ipynb"))
    idx = importlib.import_module(f"{lib()}._modidx").d["syms"]
    names = dict(lib=lib(), **{html: name for syms in idx.values() for name, (html, _) in syms.items()})
    out, about = root/"_docs", {}  # Sphinx and myst-nb leave folders beside their source and their target
    for o in (work, out): shutil.rmtree(o, ignore_errors=True)
    (work/"src").mkdir(parents=True)
    for p in [home, *paths]:
        nb = notebook(work.parent/p.name)
        about[p] = next((fm for c in nb["cells"] if c["cell_type"] == "raw" and (fm := front(text(c["source"])))), {})
        cells = site_cells(nb, p, names)
        if p == home: cells.append(dict(cell_type="markdown", metadata={}, source=contents(paths)))
        said = about[p].get("description", "")
        meta = {"language_info": dict(name="python", pygments_lexer="ipython3"), "og:description": said, "myst": {"html_meta": {"description": said}}}
        (work/"src"/f"{page(p)}.ipynb").write_text(json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=4)))
    if err := sphinx(["-W", "--keep-going", "-q", "-c", str(here), "-d", str(work/"doctrees"), str(work/"src"), str(work/"html")]): sys.exit(err)
    shutil.move(work/"html", out)
    for p in [home, *paths]: (out/f"{page(p)}.html.md").write_text(markdown(notebook(p)), encoding="utf-8")
    (out/"llms.txt").write_text(llms(about[home], about, paths), encoding="utf-8")
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
