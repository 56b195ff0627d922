"""From response to reward and success: extraction, comparison, killable workers.

Door: pool (GraderPool, Grade), compare (check_answers).
"""
