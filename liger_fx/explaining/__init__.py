"""``python -m liger_fx explain``: what liger_fx would do with a model, before it is trained.

`subject`        what is traced, and where in the model it stands
`huggingface`, `torchtune`  build a `Subject` on the meta device; imported on demand
`explanation`    traces a subject without kernels and rewrites its graphs
`memory`         bytes that a graph holds when its forward is done
`render`         the explanation to read, as text and as a page
"""
