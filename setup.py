"Package metadata from settings.ini, the version from the package, the long description from README.md."
import re, tomllib
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(); ini.read(here/"settings.ini", encoding="utf-8"); cfg = ini["DEFAULT"]
lib, rows = cfg["lib_name"], lambda key: cfg[key].strip().splitlines()
version = re.search(r'__version__ = "(.+?)"', (here/lib/"__init__.py").read_text(encoding="utf-8"))[1]
repo = tomllib.loads((here/"pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
readme = re.sub(r"\]\((?=nbs/|LICENSE)", f"]({repo}/blob/main/", (here/"README.md").read_text(encoding="utf-8"))
readme = re.sub(r"(blob/main/[^)\s]+\.png)", r"\1?raw=true", readme)  # links that also hold outside the repository

setup(version=version, packages=find_packages(include=[lib, f"{lib}.*"]), package_data={lib: ["py.typed", "weights/*.safetensors", "weights/*.json"]},
      description=cfg["description"], author=cfg["author"], keywords=cfg["keywords"].split(),
      license=cfg["license"], classifiers=rows("classifiers"), long_description=readme, long_description_content_type="text/markdown",
      install_requires=cfg["requirements"].split(),
      extras_require={o: cfg[f"{o}_requirements"].split() for o in ("nb", "timm", "hub", "onnx", "dev", "docs")},
      entry_points={"console_scripts": rows("console_scripts"), "nbdev": [f"{lib} = {lib}._modidx:d"]})
