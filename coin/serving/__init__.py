"""Coded serving: the decoding front end, over HTTP and on Ray Serve, and on a virtual clock its simulation.

N experts run on one server each. A query wants one expert's answer, or all experts'. The front end (`front_end`) asks
the expert and, by its policy (`policies`), the servers that stand in for it. Servers are coroutines: those of Ray
Serve's deployments (`ray_app`, `servers`), or simulated (`simulate`). `app` speaks the Open Inference Protocol
(`protocol`).
"""
