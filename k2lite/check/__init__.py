"""`k2lite check`: the report on a model that its owner runs and sends; and the three texts that it reads (english.txt,
python.txt, chinese.txt), which were written for k2lite and are in the public domain (CC0 1.0)."""
