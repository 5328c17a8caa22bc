#!/bin/sh
# Print which build of torch supports this machine's NVIDIA GPUs, as the last part of a wheel index's URL: cu126, or
# nothing for the default build. The reason is printed on stderr.
#
# Default builds (CUDA 13) have no code for GPUs before Turing (compute capability 7.5), that is, for Maxwell, Pascal
# (GTX 10xx) and Volta, and need driver 580. Builds for CUDA 12.6 have code for 5.0 to 9.0 and need driver 525. PyTorch
# announced 2.14 as the last release with them: github.com/pytorch/pytorch/issues/190385.

export PATH="$PATH:/usr/lib/wsl/lib"

say() { echo "$*" >&2; }

if ! command -v nvidia-smi >/dev/null; then
    say "No NVIDIA GPU found (no nvidia-smi). The CPU build of torch is smaller by 3 GB: TORCH_INDEX=.../cpu, see README."
    exit 0
fi

query() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null; }

if ! gpus=$(query name,compute_cap,driver_version); then
    if gpus=$(query name,driver_version); then # too old for compute_cap
        say "The NVIDIA driver is too old for torch ($(echo "$gpus" | head -n 1)): update it to 525 or later, 580 if you can."
    else
        say "nvidia-smi finds no GPU or no driver. The CPU build of torch is smaller by 3 GB: TORCH_INDEX=.../cpu, see README."
    fi
    exit 0
fi

# Lowest and highest compute capability, and the driver's major version; GPUs with unknown values are ignored.
echo "$gpus" | awk -F', *' '
    function say(text) { print text > "/dev/stderr" }
    NF >= 3 && $(NF - 1) + 0 > 0 {
        able = $(NF - 1) + 0
        name = substr($0, 1, index($0, ", " $(NF - 1) ", " $NF) - 1) " (compute capability " $(NF - 1) ")"
        if (!seen || able < low) { low = able; oldest = name }
        if (!seen || able > high) { high = able; newest = name }
        driver = $NF + 0; version = $NF; seen = 1
    }
    END {
        old = low < 7.5
        if (!seen) say("nvidia-smi reports no GPU that torch can use; the default build is installed.")
        else if (high < 5) say(newest ": too old for any build of torch; use the CPU, TORCH_INDEX=.../cpu, see README.")
        else if (driver && driver < 525) say("NVIDIA driver " version ": too old for torch; update it to 525 or later, 580 if you can.")
        else if (old && high >= 10) {
            say(oldest " and " newest ": no build of torch has code for both. The default one is installed, which does not support the older.")
            say("For the older one: TORCH_INDEX=.../cu126, see README.")
        }
        else if (old) {
            say(oldest ": needs torch for CUDA 12.6; default builds have no code for it. torch 2.14 is announced as the last with such a build.")
            print "cu126"
        }
        else if (driver && driver < 580 && high >= 10) say(newest ": needs NVIDIA driver 580 or later, this is " version ".")
        else if (driver && driver < 580) {
            say("NVIDIA driver " version ": too old for CUDA 13, so torch for CUDA 12.6 is installed; with driver 580 the default build works.")
            print "cu126"
        }
        else say(newest ": the default build of torch has code for it.")
    }'
