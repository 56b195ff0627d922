"""What a step says: statistics of its tokens and answers, trends over steps, causes with their evidence, sinks.

Door: statistics, trends, causes, sinks.
"""
