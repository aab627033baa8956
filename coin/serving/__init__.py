"""Coded serving: the decoding front end, over HTTP and on Ray Serve, and in `coin.serving.sim` its simulation.

N experts run on one server each. A query wants one expert's answer, or all experts'. The front end asks servers by its
policy (`coin.serving.policies`). It returns an expert's own answer if that comes in time; otherwise it takes another
server's or decodes one, and marks it. Servers are coroutines: ``coin serve`` makes them from Ray Serve's deployments
(`coin.serving.ray_app`), and `coin.serving.app` serves the Open Inference Protocol. Requests that queue up while a
server is busy form its next batch. The modules of policies and simulation need no PyTorch, FastAPI or Ray.
"""
