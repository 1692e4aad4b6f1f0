"""One run: what is prepared, the launches of graphs, buffers, lanes, sampling."""
