#!/bin/sh
# Answers each new file in a drop folder once: FOLDER/inbox/NAME.jsonl -> FOLDER/outbox/NAME.results.jsonl
#
#   */5 * * * *  /opt/pipeline/samples/drop-folder.sh /srv/pipeline
#
# No lock is needed: a file that another run is working on is skipped, and a line with an answer is not sent again.
# cron mails a job's output, so this prints only problems that need your attention; the rest goes to FOLDER/pipeline.log.
# FOLDER may hold config.yaml, and `keys` (chmod 600) with lines like: export ANTHROPIC_API_KEY=...
#
# Write files beside the inbox and move them in when they are complete; a move within one file system is atomic:
#
#   cp questions.jsonl /srv/pipeline/questions.part && mv /srv/pipeline/questions.part /srv/pipeline/inbox/q1.jsonl

set -u
umask 077
cd "${1:?give the folder that holds inbox and outbox}" || exit 2
mkdir -p inbox outbox || exit 2
if [ -f keys ]; then . ./keys; fi

"${PIPELINE:-/opt/pipeline/bin/pipeline}" run inbox/ -d outbox/ --progress log 2>>pipeline.log
code=$?

case $code in
0) ;;           # every line of every file has its answer
1) ;;           # finished; the lines that failed are in outbox/ with "success":false
75) ;;          # another run is working on it, or the provider is unreachable: the next run continues
130 | 143) ;;   # interrupted, for example by a shutdown: the next run continues
*)              # 2 configuration, 3 key or billing, 4 budget, 5 disk, 6 damaged results: you need to act
    echo "pipeline: exit code $code in $(pwd); pipeline.log ends with:"
    tail -n 20 pipeline.log
    ;;
esac
exit "$code"
