"""Models as they load where hpc_compress is not installed. For the files that test what is exported."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
sys.modules["hpc_compress"] = None
import torch, transformers
auto_class, names, inputs = json.loads(sys.argv[1])
found = {}
for name in names:
    for folder in (name, name + "-saved-again"):
        model = getattr(transformers, auto_class).from_pretrained("./" + folder, trust_remote_code=True)
        with torch.no_grad():
            found[folder] = model(**{key: torch.tensor(rows) for key, rows in inputs.items()}).logits.double().tolist()
        model.save_pretrained(name + "-saved-again")
print(json.dumps(found))
"""


def outputs_elsewhere(
    root: Path, names: Sequence[str], inputs: dict[str, Any], auto_class: str = "AutoModelForSequenceClassification"
) -> dict[str, list[Any]]:
    """Logits of the models in `root/name`, which lie there with their code, in a process that can't import hpc_compress, by
    transformers alone; and, as `name-saved-again`, of what transformers itself saved of them."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-c", SCRIPT, json.dumps([auto_class, list(names), inputs])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
