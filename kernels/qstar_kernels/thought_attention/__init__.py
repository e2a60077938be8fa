from qstar_kernels.thought_attention.op import thought_attention, thought_attention_part, thought_attention_step

__all__ = ["thought_attention", "thought_attention_part", "thought_attention_step"]
