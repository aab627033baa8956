"""Coded serving: the decoding front end, over HTTP and on Ray Serve, and in `coin.serving.sim` its simulation.

N experts run on a server each. A query wants one expert's answer, or all experts'. The front end asks whom its policy
names (`coin.serving.policies`), takes an expert's own answer where it comes in time, and otherwise another server's, or
decodes it, and says so. It knows its servers as coroutines alone: ``coin serve`` makes them of Ray Serve's deployments
(`coin.serving.ray_app`), and `coin.serving.app` speaks the Open Inference Protocol before it. Requests that wait for
one server go out together while it is at the previous batch: no request waits for others to come.

The modules of the policies and the simulation need no PyTorch, FastAPI or Ray.
"""
