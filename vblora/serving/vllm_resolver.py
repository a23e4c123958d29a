"""Packed adapters on demand in vLLM: whoever asks its server for the model "alice" gets alice.vblora.safetensors.

vLLM finds `register` by its entry point (group vllm.general_plugins), and the environment says what to serve:

    VBLORA_ADAPTERS      a folder of packed adapters, or a URL of one that fsspec reads (s3://...); without it, nothing
    VBLORA_CACHE         the folder they are expanded in; ~/.cache/vblora/lora unless given
    VBLORA_CACHE_SIZE    how many adapters it may hold ("200"), or how many bytes ("10GB", as it is unless given)
    VBLORA_BASE_MODELS   names, with commas between, that stand for the served model besides its own
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1   vLLM's own switch, without which it asks nobody

docs/serving.md shows it; the interface is vllm/lora/resolver.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from vblora.serving.expanded import Cache, Expanded, Limit, PackedFolder

NAME = "VB-LoRA"
logger = logging.getLogger("vllm.vblora")  # under vLLM's own, whose settings it has


class VBLoRAResolver(LoRAResolver):
    """Finds packed adapters by name, for vLLM.

    Names come from whoever sends a request, and vLLM answers an exception with an error of the server. So whatever is
    wrong with an adapter is logged, and the adapter is "not found".
    """

    def __init__(self, expanded: Expanded) -> None:
        self.expanded = expanded

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of this name as a request for plain LoRA, or None."""
        try:
            # In a thread, so that other requests are answered meanwhile.
            path = await asyncio.to_thread(self.expanded.find, lora_name, base_model_name)
        except (ValueError, OSError) as error:
            logger.warning("VB-LoRA adapter %r is not served: %s", lora_name, error)
            return None
        except Exception:
            logger.exception("VB-LoRA adapter %r is not served", lora_name)
            return None
        if path is None:
            return None
        # vLLM's server gives numbers of its own; this one is for whoever calls the resolver alone.
        number = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "little") // 2 + 1
        return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))


def from_environment(environment: Mapping[str, str]) -> VBLoRAResolver | None:
    """The resolver that the environment asks for, None where it names no adapters.

    Raises:
        ValueError: a variable is wrong; the message names it.
    """
    place = environment.get("VBLORA_ADAPTERS")
    if not place:
        return None
    folder = environment.get("VBLORA_CACHE") or "~/.cache/vblora/lora"
    try:
        variable = "VBLORA_ADAPTERS"
        adapters = PackedFolder(place)
        variable = "VBLORA_CACHE_SIZE"
        limit = Limit.of(environment.get(variable) or "10GB")
        variable = "VBLORA_CACHE"
        cache = Cache(Path(folder).expanduser(), limit)
    except (ValueError, OSError, RuntimeError) as error:  # the last where nobody is at home
        raise ValueError(f"{variable}: {error}") from error
    bases = environment.get("VBLORA_BASE_MODELS", "").split(",")
    return VBLoRAResolver(Expanded(adapters, cache, frozenset(name.strip() for name in bases if name.strip())))


def register() -> None:
    """What vLLM calls when it starts, in each of its processes; a mistake in the environment stops it there."""
    resolver = from_environment(os.environ)
    if resolver is not None and NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, resolver)
