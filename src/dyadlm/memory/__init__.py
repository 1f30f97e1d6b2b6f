"""A memory of what followed each context, mixed into the predictions of any causal language model."""

from dyadlm.memory.context_memory import ContextMemory, MemoryOptions

__all__ = ["ContextMemory", "MemoryOptions"]
