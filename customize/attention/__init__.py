"""Which kernel computes attention: chosen, checked against float64, put in place and taken back.

Kernels are torch's, xFormers' and those of diffusers' dispatcher, none of our own. The models of
diffusers reach them in two ways. FLUX, Qwen-Image and Z-Image ask the dispatcher, for the backend
that each attention processor names; a processor of anyone's that has ``_attention_backend`` does.
UNets, Stable Diffusion 3 and AutoencoderKL have processors that call torch's attention or xFormers'
themselves, so they have no others; ``model.set_attention_backend`` does nothing to them, silently.
Text encoders are transformers', and take torch's attention.
"""
