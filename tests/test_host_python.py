"""The Python that tools/host.py builds: torchvision can be imported, and starting it imports no torch, whose allocator
ComfyUI has to choose first.
"""

import subprocess
import sys


def test_torchvision_comes_when_it_is_asked_for():
    code = (
        "import sys; assert 'torch' not in sys.modules; import torchvision.transforms, torch; assert "
        "torchvision.ops.nms"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
