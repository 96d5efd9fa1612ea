#!/usr/bin/env bash
# Boot a Debian kernel in QEMU on top of this machine's own root filesystem,
# run one command in it as root and return that command's exit status.
#
#   vm-run.sh get SUITE [PACKAGE]            download and unpack a kernel (unless it is already
#                                            there), print its directory
#   vm-run.sh run [OPTION...] KERNEL_DIR -- COMMAND [ARGUMENT...]
#
# Examples:
#   k=$(vm-run.sh get bookworm)                                          # newest 6.1
#   k=$(vm-run.sh get trixie-backports 'linux-image-6.18.*-amd64')       # newest that matches
#   vm-run.sh run "$k" -- uname -r
#   vm-run.sh run -s "$PWD" -t 900 "$k" -- ./some-test
#
# Options of run:
#   -s DIR     share DIR with the guest, read-write, at the same path (repeatable).
#              Default: the current directory. Everything else is a read-only view
#              of this machine's files under a throw-away overlay.
#   -e N[=V]   pass an environment variable to the command (repeatable)
#   -c CPUS    guest CPUs (default: as many as this machine has, at least 2)
#   -m SIZE    guest memory (default 2G)
#   -t SECONDS give up after that long (default 600)
#   -a ACCEL   kvm, tcg, icount or auto (default auto: kvm only where the CPU really has
#              vmx/svm, else tcg). icount is tcg with a virtual clock, one CPU and
#              1 ns per guest instruction: rates measured in such a guest count
#              instructions, and do not depend on the load of this machine.
#   -C MODEL   QEMU CPU model (default: host with kvm; with tcg see tcg_cpu below)
#   -k ARGS    extra kernel command line
#   -v         show the guest's console on stderr
#
# In the guest: root, PID 1 is a small shell script, no network device but lo,
# /tmp and /run are fresh tmpfs, modules of the booted kernel can be loaded with
# modprobe, bpffs, tracefs, debugfs and cgroup2 are mounted. stdout and stderr of the
# command are passed through unmixed; its stdin is /dev/null.
#
# Exit status of run: that of the command; 124 timed out; 125 the guest did not
# finish (panic, oops, failed boot), with the end of its console on stderr.
#
# Environment: VMLAB_DIR (default /opt/vmlab) keeps kernels and apt lists;
# VMLAB_MIRROR and VMLAB_SECURITY_MIRROR replace the mirrors that this machine's
# apt configuration names.
#
# Debian packages needed here (bookworm or later):
#   get: apt dpkg kmod util-linux debian-archive-keyring
#   run: qemu-system-x86 busybox-static kmod cpio xz-utils zstd
#   (qemu-system-x86 --no-install-recommends is enough; where other QEMU packages
#   came from backports, add -t bookworm-backports.)
# The kernel must have 9p as built-in or module: Debian's "amd64" flavour has it,
# the "cloud-amd64" flavour has not.
# The whole root filesystem is readable in the guest: run only code you trust.

set -euo pipefail

VMLAB_DIR=${VMLAB_DIR:-/opt/vmlab}
PATH=$PATH:/usr/sbin:/sbin

die() { printf 'vm-run: %s\n' "$*" >&2; exit 125; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }
need() { local t; for t; do command -v "$t" >/dev/null || die "missing tool: $t (see the package list in $0)"; done; }

# ---- kernel directory ------------------------------------------------------

# Where lib/modules is, relative to an unpacked kernel: older packages use /lib,
# newer ones /usr/lib.
modroot() {
	if [[ -d $1/lib/modules ]]; then printf '%s\n' "$1"
	elif [[ -d $1/usr/lib/modules ]]; then printf '%s\n' "$1/usr"
	else die "$1: no lib/modules in it"; fi
}

release_of() {
	local r; r=$(modroot "$1")
	set -- "$r"/lib/modules/*/
	if (($# != 1)) || [[ ! -d $1 ]]; then die "$r/lib/modules: expected exactly one kernel"; fi
	basename "$1"
}

image_of() {
	local f rel root
	rel=$(release_of "$1"); root=$(modroot "$1")
	for f in "$1/boot/vmlinuz-$rel" "$root/lib/modules/$rel/vmlinuz"; do
		[[ -f $f ]] && { printf '%s\n' "$f"; return; }
	done
	die "$1: no vmlinuz in it"
}

ensure_depmod() {
	local root rel
	root=$(modroot "$1"); rel=$(release_of "$1")
	[[ -s $root/lib/modules/$rel/modules.dep ]] || depmod -b "$root" "$rel"
}

# ---- get -------------------------------------------------------------------

# Base address of the archive with this label, as this machine's apt has it.
repo_uri() {
	# shellcheck disable=SC2016 # $(REPO_URI) is apt's own format, not a command
	apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Label: $1" | sort -u | head -n 1
}

cmd_get() {
	local suite=${1:?suite} package=${2:-linux-image-amd64}
	need apt-get apt-cache dpkg-deb depmod flock
	local main sec work
	main=${VMLAB_MIRROR:-$(repo_uri Debian)}
	sec=${VMLAB_SECURITY_MIRROR:-$(repo_uri Debian-Security)}
	[[ -n $main ]] || die "apt knows no Debian archive: run apt-get update, or set VMLAB_MIRROR"

	local state=$VMLAB_DIR/apt/$suite
	mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$VMLAB_DIR/kernels"
	exec 9>"$state/lock"
	flock 9
	: >"$state/status"
	printf 'deb %s %s main\n' "$main" "$suite" >"$state/sources.list"
	case $suite in
	*-backports | *-updates | *-security | sid | unstable | experimental) ;;
	*) [[ -z $sec ]] || printf 'deb %s %s-security main\n' "$sec" "$suite" >>"$state/sources.list" ;;
	esac
	# A private apt view of that one suite: the machine's own package state,
	# sources and preferences are neither used nor changed.
	local apt=(-qq -o "Dir::Etc::SourceList=$state/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
		-o "Dir::State::Lists=$state/lists" -o "Dir::State::Status=$state/status"
		-o "Dir::Cache=$state/cache" -o APT::Architecture=amd64 -o APT::Sandbox::User=root
		-o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
	apt-get "${apt[@]}" update >&2

	# A pattern stands for the newest package that matches.
	if [[ $package == *[*]* ]]; then
		local name newest=''
		while read -r name; do
			# shellcheck disable=SC2053 # a pattern is meant
			[[ $name == $package && $name != *-cloud-* && $name != *-rt-* ]] || continue
			newest=$(printf '%s\n' "$newest" "$name" | sort -V | tail -n 1)
		done < <(apt-cache "${apt[@]}" pkgnames linux-image-)
		[[ -n $newest ]] || die "no package $package in $suite"
		package=$newest
	fi

	# Follow the dependencies from the metapackage to the packages that hold the
	# files (one linux-image-VERSION; since 7.2 split in base, binary and modules).
	local queue=("$package") seen=() p d
	while ((${#queue[@]})); do
		p=${queue[0]}; queue=("${queue[@]:1}")
		[[ " ${seen[*]} " == *" $p "* ]] && continue
		seen+=("$p")
		while read -r d; do queue+=("$d"); done < <(
			apt-cache "${apt[@]}" depends --no-recommends --no-suggests --no-conflicts --no-breaks \
				--no-replaces --no-enhances "$p" |
				sed -nE 's/^ *\|?(Pre)?Depends: (linux-(image|binary|modules|base)-[0-9].*)$/\2/p')
	done

	local real=() files
	for p in "${seen[@]}"; do [[ $p != linux-*-[0-9]* ]] || real+=("$p"); done
	((${#real[@]})) || die "$package in $suite leads to no kernel package"

	# Names, sizes and hashes of the package files: the same ones need no second download.
	files=$(apt-get "${apt[@]}" download --print-uris "${real[@]}" | sort)
	for d in "$VMLAB_DIR"/kernels/*/; do
		if [[ -f $d/.files && $(<"$d/.files") == "$files" ]]; then
			printf '%s\n' "${d%/}"
			return
		fi
	done

	work=$(mktemp -d "$VMLAB_DIR/get.XXXXXX")
	# shellcheck disable=SC2064 # expand now
	trap "rm -rf '$work'" EXIT
	mkdir "$work/debs" "$work/root"
	(cd "$work/debs" && apt-get "${apt[@]}" download "${real[@]}" >&2)
	for d in "$work"/debs/*.deb; do dpkg-deb -x "$d" "$work/root"; done
	local rel dest
	rel=$(release_of "$work/root")
	dest=$VMLAB_DIR/kernels/$rel
	ensure_depmod "$work/root"
	chmod 755 "$work/root"
	printf '%s\n' "$files" >"$work/root/.files"
	rm -rf "$dest"
	mv "$work/root" "$dest"
	printf '%s\n' "$dest"
}

# ---- run -------------------------------------------------------------------

# Without erms and fsrm the kernel copies with plain moves: TCG translates those,
# but executes "rep movsb" byte by byte.
tcg_cpu=max,la57=off,erms=off,fsrm=off

# stage1 runs from the initramfs: loads modules, assembles the root filesystem.
write_stage1() {
	cat >"$1" <<'GUEST'
#!/bin/busybox sh
bb=/bin/busybox
fail() { $bb echo "vm-run stage1: $*"; $bb sync; $bb reboot -f; }
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
while read -r m; do $bb insmod "/modules/$m" || fail "insmod $m"; done </modules/order
o=trans=virtio,version=9p2000.L,msize=512000
$bb mkdir /lower /upper /newroot
$bb mount -t 9p -o "$o,cache=loose,ro" vmroot /lower || fail "9p root"
$bb mount -t tmpfs -o size=75% upper /upper
$bb mkdir /upper/data /upper/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /newroot || fail overlay
$bb mkdir -p /newroot/proc /newroot/sys /newroot/dev /newroot/run
$bb mount -t tmpfs run /newroot/run
$bb mkdir /newroot/run/vmjob
$bb mount -t 9p -o "$o,cache=none" vmjob /newroot/run/vmjob || fail "9p job"
$bb umount /proc /sys /dev
exec $bb switch_root /newroot /bin/bash /run/vmjob/stage2
GUEST
	chmod 755 "$1"
}

# stage2 is PID 1 of the guest proper.
write_stage2() {
	cat >"$1" <<'GUEST'
job=/run/vmjob
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
finish() { echo "$1" >$job/rc.tmp; mv $job/rc.tmp $job/rc; sync; echo b >/proc/sysrq-trigger; sleep 60; }
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sys /sys
mount -t devtmpfs -o mode=755 dev /dev
mkdir -p /dev/pts /dev/shm /run/lock /run/netns /run/vmmods
mount -t devpts -o gid=5,mode=620 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin; ln -sfn fd/1 /dev/stdout; ln -sfn fd/2 /dev/stderr
mount -t bpf -o nosuid,nodev,noexec bpf /sys/fs/bpf
mount -t tracefs -o nosuid,nodev,noexec trace /sys/kernel/tracing
mount -t debugfs -o nosuid,nodev,noexec debug /sys/kernel/debug
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
o=trans=virtio,version=9p2000.L,msize=512000
mkdir -p /lib/modules
mount -t 9p -o "$o,cache=loose,ro" vmmods /lib/modules
while IFS= read -r -d '' tag && IFS= read -r -d '' dir; do
	mkdir -p "$dir" && mount -t 9p -o "$o,cache=mmap" "$tag" "$dir" || { echo "vm-run stage2: cannot share $dir"; finish 125; }
done <$job/shares
ip link set lo up
hostname vmlab
for p in /sys/class/virtio-ports/*; do
	case $(cat "$p/name") in
	vmout) out=/dev/${p##*/} ;;
	vmerr) err=/dev/${p##*/} ;;
	esac
done
setsid -w /bin/bash $job/command </dev/null >"$out" 2>"$err"
finish $?
GUEST
}

pick_accel() {
	# A present /dev/kvm is not enough: on a host whose KVM has neither VMX nor SVM
	# under it (kvm-pvm), unmodified kernels do not boot.
	if [[ -w /dev/kvm ]] && grep -qwE 'vmx|svm' /proc/cpuinfo; then echo kvm; else echo tcg; fi
}

job='' guest=''
cleanup() {
	if [[ -n $guest ]]; then
		kill "$guest" 2>/dev/null || true
		wait "$guest" || true
	fi
	[[ -z $job ]] || rm -rf "$job"
}

cmd_run() {
	local shares=() envs=() cpus mem=2G limit=600 accel=auto model='' kargs='' verbose='' opt
	cpus=$(nproc); ((cpus >= 2)) || cpus=2
	while getopts s:e:c:m:t:a:C:k:v opt; do
		case $opt in
		s) shares+=("$(realpath -e -- "$OPTARG")") ;;
		e) envs+=("$OPTARG") ;;
		c) cpus=$OPTARG ;;
		m) mem=$OPTARG ;;
		t) limit=$OPTARG ;;
		a) accel=$OPTARG ;;
		C) model=$OPTARG ;;
		k) kargs=$OPTARG ;;
		v) verbose=1 ;;
		*) usage ;;
		esac
	done
	shift $((OPTIND - 1))
	(($# >= 2)) || usage
	local kdir=$1; shift
	[[ $1 != -- ]] || shift
	(($#)) || usage
	need qemu-system-x86_64 busybox cpio modprobe depmod realpath timeout
	if ((${#shares[@]} == 0)) && [[ $PWD != / ]]; then shares=("$PWD"); fi
	[[ " ${shares[*]} " != *" / "* ]] || die "/ cannot be shared read-write"
	kdir=$(realpath -e -- "$kdir")

	local rel root image
	rel=$(release_of "$kdir"); root=$(modroot "$kdir"); image=$(image_of "$kdir")
	ensure_depmod "$kdir"
	[[ $accel != auto ]] || accel=$(pick_accel)
	local clock=()
	case $accel in
	tcg) accel=tcg,thread=multi; model=${model:-$tcg_cpu} ;;
	icount) accel=tcg,thread=single; model=${model:-$tcg_cpu}; cpus=1; clock=(-icount 'shift=0,sleep=off' -rtc clock=vm) ;;
	kvm) model=${model:-host} ;;
	*) usage ;;
	esac

	job=$(mktemp -d "${TMPDIR:-/tmp}/vm-run.XXXXXX")
	trap cleanup EXIT
	trap 'exit 130' INT TERM HUP

	# The command, its environment and its working directory.
	local e a
	{
		for e in "${envs[@]}"; do
			if [[ $e != *=* ]]; then e=$e=${!e-}; fi
			printf 'export %s=%q\n' "${e%%=*}" "${e#*=}"
		done
		printf 'cd %q 2>/dev/null || cd /\nexec' "$PWD"
		for a; do printf ' %q' "$a"; done
		printf '\n'
	} >"$job/command"
	write_stage2 "$job/stage2"

	# Initramfs: busybox, the few modules needed to reach the root filesystem, stage1.
	local ird=$job/initramfs mod kind path
	mkdir -p "$ird"/{bin,proc,sys,dev,modules}
	cp "$(command -v busybox)" "$ird/bin/busybox"
	write_stage1 "$ird/init"
	: >"$ird/modules/order"
	for mod in virtio_pci virtio_console 9pnet_virtio 9p overlay; do
		modprobe -d "$root" -S "$rel" --show-depends "$mod" >"$job/deps" ||
			die "$rel has no module $mod (cloud flavour?)"
		while read -r kind path _; do
			[[ $kind == insmod ]] || continue
			mod=$(basename "${path%.ko*}").ko
			[[ -e $ird/modules/$mod ]] && continue
			case $path in
			*.xz) xz -dc "$path" >"$ird/modules/$mod" ;;
			*.zst) zstd -qdc "$path" >"$ird/modules/$mod" ;;
			*.gz) gzip -dc "$path" >"$ird/modules/$mod" ;;
			*) cp "$path" "$ird/modules/$mod" ;;
			esac
			echo "$mod" >>"$ird/modules/order"
		done <"$job/deps"
	done
	(cd "$ird" && find . -print0 | cpio --quiet -0 -o -H newc) >"$job/initrd"

	local drives=() i=0 s
	: >"$job/shares"
	for s in "${shares[@]}"; do
		drives+=(-fsdev "local,id=s$i,path=${s//,/,,},security_model=none,multidevs=remap"
			-device "virtio-9p-pci,fsdev=s$i,mount_tag=share$i")
		printf 'share%d\0%s\0' "$i" "$s" >>"$job/shares"
		i=$((i + 1))
	done

	# Pipes, because QEMU wants write-only descriptors, which a terminal is not.
	local outpid errpid qrc=0
	exec 3> >(exec cat); outpid=$!
	exec 4> >(exec cat >&2); errpid=$!
	local console=(-serial "file:$job/console")
	[[ -z $verbose ]] || console=(-chardev "file,id=con,path=/dev/fdset/2,append=on,logfile=$job/console" -serial chardev:con)
	timeout -k 5 "$limit" qemu-system-x86_64 -machine q35 -accel "$accel" -cpu "$model" \
		"${clock[@]}" -smp "$cpus" -m "$mem" -display none -monitor none -nodefaults -no-user-config -no-reboot -nic none \
		-add-fd fd=3,set=1 -add-fd fd=4,set=2 "${console[@]}" \
		-device virtio-serial-pci \
		-chardev file,id=out,path=/dev/fdset/1,append=on -device virtserialport,chardev=out,name=vmout \
		-chardev file,id=err,path=/dev/fdset/2,append=on -device virtserialport,chardev=err,name=vmerr \
		-fsdev local,id=root,path=/,security_model=none,readonly=on,multidevs=remap \
		-device virtio-9p-pci,fsdev=root,mount_tag=vmroot \
		-fsdev "local,id=mods,path=${root//,/,,}/lib/modules,security_model=none,readonly=on" \
		-device virtio-9p-pci,fsdev=mods,mount_tag=vmmods \
		-fsdev "local,id=job,path=$job,security_model=none" \
		-device virtio-9p-pci,fsdev=job,mount_tag=vmjob "${drives[@]}" \
		-object rng-random,id=rng,filename=/dev/urandom -device virtio-rng-pci,rng=rng \
		-kernel "$image" -initrd "$job/initrd" \
		-append "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check $kargs" \
		</dev/null >"$job/qemu" 2>&1 &
	guest=$! # in the background, so that signals to this script end it at once
	wait "$guest" || qrc=$?
	guest=''
	exec 3>&- 4>&-
	wait "$outpid" "$errpid" || true

	if [[ -s $job/rc ]]; then
		exit "$(<"$job/rc")"
	fi
	cat "$job/qemu" >&2
	tail -n 40 "$job/console" >&2 || true
	if ((qrc == 124 || qrc == 137)); then
		printf 'vm-run: guest still running after %s s\n' "$limit" >&2
		exit 124
	fi
	die "the guest ended without running the command to its end (qemu status $qrc)"
}

case ${1:-} in
get) shift; cmd_get "$@" ;;
run) shift; cmd_run "$@" ;;
-h | --help | help) usage 0 ;;
*) usage ;;
esac
