"""What settings need before anything is loaded: memory stage by stage, disk, time; and settings that fit a card.

``runs`` has the project's own code work on fake tensors (``counter``) at true widths; ``plan`` adds weights, adapters
and optimizer, says which settings fit, and puts it into tables; ``cards`` knows how fast cards are. All of it is
computed on a CPU: nothing here runs on a card.
"""
