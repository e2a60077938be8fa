from qstar_kernels.lm_head.log_prob import linear_log_prob
from qstar_kernels.lm_head.log_prob_sum import linear_log_prob_sum
from qstar_kernels.lm_head.mix import mix_hidden
from qstar_kernels.lm_head.sample import sample_linear

__all__ = ["linear_log_prob", "linear_log_prob_sum", "mix_hidden", "sample_linear"]
