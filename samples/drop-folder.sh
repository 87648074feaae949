#!/bin/sh
# Answers each new file of a drop folder once: FOLDER/inbox/NAME.jsonl -> FOLDER/outbox/NAME.results.jsonl
#
#   */5 * * * *  /opt/pipeline/samples/drop-folder.sh /srv/pipeline
#
# No lock is needed: a file that another run is at is skipped, and a line that has its answer is not sent again.
# cron mails what a job prints, so this prints only what somebody must look at; the rest goes to FOLDER/pipeline.log.
# FOLDER may hold config.yaml, and `keys` (chmod 600) with lines like: export ANTHROPIC_API_KEY=...
#
# Write files beside the inbox and move them in when they are whole; a move on the same disk happens at once:
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
75) ;;          # another run is at it, or the provider is out of reach: the next run goes on
130 | 143) ;;   # interrupted, as when the machine goes down: the next run goes on
*)              # 2 configuration, 3 key or billing, 4 budget, 5 disk, 6 damaged results: somebody must act
    echo "pipeline: exit code $code in $(pwd); pipeline.log ends with:"
    tail -n 20 pipeline.log
    ;;
esac
exit "$code"
