"""Options of a build. They reject requests that cannot be built before any work starts.

`options.compile` imports torch. `options.engines` and `options.quantize` do not.
"""
