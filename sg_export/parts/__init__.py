"""The parts of a pipeline around its network: text encoder and decoder, from folders of diffusers.

Their modules are those of transformers and diffusers, which the extra `diffusers` installs.
"""
