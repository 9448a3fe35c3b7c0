"""Which kernel computes attention: chosen, checked against float64, put in place and taken back.

Kernels are torch's, xFormers' and those of diffusers' dispatcher, none of our own. The models of
diffusers reach them in two ways. Most transformers ask the dispatcher, for the backend that
each attention processor names; a processor of anyone's that has ``_attention_backend`` does. UNets,
Stable Diffusion 3 and AutoencoderKL have processors that call torch's attention or xFormers'
themselves, and CogVideoX one that calls torch's, so they have no others;
``model.set_attention_backend`` does nothing to them, silently. Qwen-Image 2.1 asks only where it
keeps what it made of the prompt, in all steps but the first; else it takes the process's default.
Text encoders are transformers', and take torch's attention.
"""
