"""diffusers' `save_pretrained`, for quantized models: config.json has the fingerprint of the files' manifest.

diffusers writes the configuration first, and only then asks the quantizer what the files' metadata should be. So the
manifest is made before both. A save that is interrupted, or files that are mixed with those of another one, then
differ in their fingerprints.
"""

import functools
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.models import modeling_utils

from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError
from orbitdit.integrations.diffusers import OrbitQuantizer
from orbitdit.manifest import ENTRY, dumps, read_header, replace_metadata


def _save_pretrained(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> None:
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, OrbitQuantizer):
            original(self, *args, **options)
            return
        given = signature.bind(self, *args, **options).arguments
        if not given.get("safe_serialization", True) or given.get("use_flashpack"):
            raise CheckpointError("quantized models are saved as safetensors files: leave safe_serialization=True")
        config = self.config["quantization_config"]  # a dictionary since diffusers made JSON of it
        config = config if isinstance(config, OrbitQuantConfig) else OrbitQuantConfig.from_dict(config)
        quantizer.prepared = manifest = quantizer.make_manifest(self.state_dict())
        self.register_to_config(quantization_config=replace(config, fingerprint=manifest["fingerprint"]))
        try:
            original(self, *args, **options)
            for file in Path(given["save_directory"]).glob("*.safetensors"):
                if read_header(file).metadata.get(ENTRY) == dumps(manifest):
                    replace_metadata(file)  # the same bytes each time
        finally:
            quantizer.prepared = None
            self.register_to_config(quantization_config=config)

    return save_pretrained


def register() -> None:
    """Extend `ModelMixin.save_pretrained`. Idempotent."""
    original = modeling_utils.ModelMixin.save_pretrained
    if not hasattr(original, "of_diffusers"):
        modeling_utils.ModelMixin.save_pretrained = _save_pretrained(original)
        modeling_utils.ModelMixin.save_pretrained.of_diffusers = original


register()
