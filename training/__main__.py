"""python -m training WHAT ...: the pack is loaded as one package, so that its rooms can be imported as in ComfyUI."""

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(
        "strata", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    sys.modules["strata"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["strata"])
    from strata.training.command import main

    sys.exit(main())
