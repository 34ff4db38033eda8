"""The panel that recognises: `add_panel` puts it on each page of the built site that holds `<div id="recognise">`.

Its runtime, 14 MB, goes from npm's registry into the built site and a cache in `build/`; nothing of it is committed."""
import json
import logging
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

here = Path(__file__).resolve().parent
root = here.parents[1]
VERSION = "1.30.0" # of onnxruntime-web
SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME = "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
NETWORKS = { # the name of weights that the package brings; what its button says, and for what it is good
    "glyphs": ("Your own drawings",
        "This network has learned from drawn glyphs of 32 × 32 pixels. "
        "It suits signs and simple drawings, not photographs."),
    "photos": ("Your own photographs",
        "This network has learned from photographs of 32 × 32 pixels, and sees no more of yours. "
        "Large networks do better.")}
MARK = re.compile(r'<div id="recognise">.*?</div>', re.S)

def add_runtime(folder):
    "Put onnxruntime-web into `folder`; False where neither the cache nor npm has it."
    from mtl_nb.core import sha256
    archive = root/f"build/onnxruntime-web-{VERSION}.tgz"
    if not archive.exists():
        archive.parent.mkdir(exist_ok=True)
        pack = ["npm", "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", str(archive.parent)]
        try: subprocess.run(pack, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError): return False
    if sha256(archive) != SHA256:
        raise SystemExit(f"{archive} is damaged, or not what it should be: remove it and build again")
    with tarfile.open(archive) as tar:
        for name in RUNTIME: (folder/name).write_bytes(tar.extractfile(f"package/dist/{name}").read())
    return True

def glyph_task():
    "Five classes that the glyphs' network has not seen, six images of each: names, and uint8 [5,6,3,32,32]."
    from mtl_nb.data.glyphs import glyphs
    bank = glyphs(0)["test"]
    return list("ABCDE"), np.stack([bank.x[bank.by_class[c][:6]].numpy() for c in range(0, 20, 4)])

def save_sprite(images, path):
    "A row a class, the support image first."
    rows = images.transpose(0, 3, 1, 4, 2) # [5,32,6,32,3]
    Image.fromarray(rows.reshape(rows.shape[0]*rows.shape[1], -1, 3)).save(path)

def add_networks(folder):
    "Export the networks that there are; what the panel must know of each."
    from mtl_nb.onnx import export_onnx
    from mtl_nb.hub import BUNDLED
    from mtl_nb.recognize import load_extractor
    logging.disable(logging.INFO) # the exporter reports each step
    found = []
    for name, (title, hint) in NETWORKS.items():
        if not (BUNDLED/f"{name}.safetensors").exists(): continue
        model, preprocessing, _ = load_extractor(name)
        export_onnx(model, folder/f"{name}.onnx", preprocessing)
        found.append(dict(name=name, title=title, hint=hint))
    if found and found[0]["name"] == "glyphs": # with a task to try
        names, images = glyph_task()
        save_sprite(images, folder/"glyphs.png")
        found[0] |= dict(sprite="glyphs.png", names=names)
    logging.disable(logging.NOTSET)
    return found

def add_panel(out):
    "Put the panel and what it loads into the built site `out`."
    pages = [p for p in out.glob("*.html") if MARK.search(p.read_text(encoding="utf-8"))]
    if not pages: return
    folder = out/"recognise"
    shutil.copytree(here/"recognise", folder, ignore=shutil.ignore_patterns("*.html"))
    runtime, networks = add_runtime(folder), add_networks(folder)
    for o in networks:
        loaded = sum((folder/name).stat().st_size for name in (*RUNTIME, f"{o['name']}.onnx") if (folder/name).exists())
        o["megabytes"] = round(loaded/1e6)
    about = json.dumps(dict(runtime=runtime, networks=networks))
    panel = (here/"recognise/panel.html").read_text(encoding="utf-8").replace("NETWORKS", about)
    for p in pages: p.write_text(MARK.sub(lambda _: panel, p.read_text(encoding="utf-8"), 1), encoding="utf-8")
