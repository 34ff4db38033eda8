"What the process of `crash.py` that others are forked from has done once: imports, the parser, a figure with fonts."
import io

import matplotlib.backends.backend_agg
import PIL.PngImagePlugin
import pytest
import torch
import torch._dynamo

import mtl_nb.experiments.report
import mtl_nb.methods.ablations
import mtl_nb.publish
import mtl_nb.recognize
from mtl_nb.cli import RecognizeOptions, _comments, read_run_options
from mtl_nb.experiments.run import plot_curves

torch.set_num_threads(1)
read_run_options(["--data", "glyphs", "--hard.random", "4"])
_comments(RecognizeOptions)
plot_curves([dict(phase=2, run="mtl-1shot", tasks=o, val=.5) for o in range(3)]).savefig(io.BytesIO(), format="png")
