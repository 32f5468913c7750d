# Run a page in namespaces of its own: ports, processes, and folders that a page may write.
#
#   inside.sh FOLDER SCRIPT
set -eu
ip link set lo up
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" /etc
# The clone may be below one of the folders that are covered.
mkdir "$1/clone"
mount --rbind "$PAGE_ROOT" "$1/clone"
for each in /run /srv /var/log; do mount -t tmpfs none $each; done
if [ ! -e "$PAGE_ROOT" ]; then
    mkdir -p "$PAGE_ROOT"
    mount --rbind "$1/clone" "$PAGE_ROOT"
fi
mkdir /run/lock /srv/web /srv/home
printf "max-time = 30\nfail\n" >/srv/home/.curlrc
cd /srv/web
ln -s "$PAGE_VENV" .venv
ln -s "$PAGE_ROOT/init.d" init.d
ln -s "$PAGE_ROOT/exporter" exporter
# Its files alone: a __pycache__ may stand beside them.
find "$PAGE_ROOT/tests/pages/reader" -maxdepth 1 -type f -exec cp {} . \;
exec bash -c "$2"
