"""What a step says: statistics of its tokens and answers, trends over the steps, causes, and where all of it goes.

Door: metrics, statistics, cost, trends, causes, sinks, timeline.
"""
