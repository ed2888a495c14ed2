"""Memory and flex models, from a checkpoint or a bundle, as transformers' Auto classes load them.

    import tolkit.hf
    model = AutoModelForCausalLM.from_pretrained("small.tol")

Importing registers model_type "memoryllm" with AutoConfig, AutoModelForCausalLM and AutoTokenizer.
A dense checkpoint is a plain Llama and stays transformers' own. Needs the extra `tolkit[hf]`.

Raises:
    ResourceError: transformers is not installed.
"""

from tolkit.errors import ResourceError

try:
    import transformers  # noqa: F401  # asked for before the modules below need it
except ImportError as error:
    raise ResourceError(
        "tolkit.hf: transformers is not installed", hint="pip install 'tolkit[hf]'"
    ) from error

from tolkit.hf.config import MemoryLlmConfig
from tolkit.hf.model import MemoryLlmForCausalLM
from tolkit.hf.registry import register

__all__ = ["MemoryLlmConfig", "MemoryLlmForCausalLM", "register"]

register()
