#!/bin/bash
cd /tmp/h-predictions2; export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=/tmp/wt/predictions:/tmp/h-predictions2:/tmp/site-predictions:$PP
timeout ${T:-300} /root/env/bin/python -W ignore "$@" 2>&1
