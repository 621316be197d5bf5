"""Code shared by the four scripts. A package that is not installed is named here, before anything needs it."""
import importlib.util
import sys

for name in ("numpy", "PIL", "torch", "torchvision", "tqdm", "pydensecrf"):
    if importlib.util.find_spec(name) is None:
        sys.exit(f"error: {name} is not installed here: run pip install -r requirements.txt")
