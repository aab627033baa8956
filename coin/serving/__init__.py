"""Coded serving: the decoding front end, its engines, and the simulation of its tail latency.

N experts and R coded models run on a server each. A query wants one expert's answer, or all experts'. The front end
(`coin.serving.front_end`) asks the servers that its policy names (`coin.serving.policies`), takes an expert's own
answer where it comes in time, and otherwise decodes it from those that did come, marked as decoded. It knows its
servers as coroutines alone; ``coin serve`` makes them of Ray Serve's deployments (`coin.serving.ray_engine`).
Requests that wait for one server go out together, up to ``limits.batch`` images at a time, while the server is at the
previous batch (`coin.serving.server_queue`): no request waits for others to come.

The simulation (`coin.serving.simulation`) makes the same decisions with the same code on a clock of its own, and
``coin simulate`` feeds it with service times measured on the machine that it runs on and with the accuracies of the
experiment's own results. What its numbers mean:

- Latency is the time from a query's arrival to its answer; p99.9 is what one query in a thousand exceeds. A query
  that fails has infinite latency, so that failing fast makes no policy look quick. Intervals are 95 % bootstrap
  intervals over blocks of neighbouring queries.
- Every policy has the same number of servers, N + R. Without coding, the R extra ones are copies of experts: with
  R = 1 one expert has a copy and the others have none. A coded model stands by for all of them; that is the point of
  coding, and what its approximate answers buy.
- The load is what own answers alone take up of the experts' capacity. What a policy asks on top costs on top: where
  one answer is wanted, ``coded_proactive`` runs N + R forward passes for it, and its servers are overloaded from a load
  of 1/N on. Where all experts' answers are wanted, it costs R forward passes more than none. ``coded_hedged`` asks the
  others for the late queries alone. The column ``forwards`` says what that came to.
- Coding needs headroom: an expert that is down sends its queries to all others. At a load above one half of them
  there is none, queues grow until it is back, and coding makes the tail worse than failing would.
- R coded models make up for R servers at a time. The tail beyond the share of the time in which more than R are slow
  at once is that of the slow servers, whatever the policy.
- Effective accuracy is (1 − share)·expert + share·decoded accuracy. The accuracies are the experiment's own, on its
  test sets, mean over tasks and lost experts; answers that never came count as wrong.
- The simulation serves one request after the other: batches, the network and processors that servers share are not
  in it.

Beside ParM (Kosaian, Rashmi, Venkataraman: *Parity Models*, SOSP 2019), which codes over *queries*: it encodes k
queries to one model into one parity query, for a parity model that is trained for that, on top of k replicas of the
same network. Its authors report that it reduces the gap between 99.9th-percentile and median latency by up to 3.5×
while maintaining the same median, on a cluster, under load that slows servers. Here the code is over *models*: the
experts differ, every one of them sees the query itself, and the coded model is merged from their weights, mostly
without training. The numbers are not comparable: other networks, machines and slowdowns. What can be compared is the
cost: ParM's parity query is one forward pass for k queries; to decode one expert here takes all other N − 1 experts'
answers to the same query and the coded model's, which is cheap only where those answers are wanted anyway or seldom
needed.

Import from the modules: those of the policies and the simulation need no PyTorch, and the simulation's worker
processes start without it.
"""
