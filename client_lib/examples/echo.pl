#!/usr/bin/perl
# Sends each line back as `[pid] line`, one client after another; `quit` closes.
#
#     SocketProtector --workers 4 4321 -- perl echo.pl 4321
#     perl echo.pl 4321                 # without a protector
#
# Perl's core has no recvmsg, so take() makes the system call itself.  It knows the arguments' layout
# for 64-bit Linux on x86_64 and aarch64.  On other machines use Socket::MsgHdr from CPAN.
use strict;
use warnings;
use Config;
use Errno qw(EAGAIN EINTR EWOULDBLOCK);
use Fcntl qw(F_SETFD FD_CLOEXEC);
use IO::Handle;
use IO::Socket::IP;
use Socket;

use constant {
    MSG_CTRUNC_      => 0x8,
    MSG_DONTWAIT_    => 0x40,
    MSG_NOSIGNAL_    => 0x4000,
    MSG_CMSG_CLOEXEC => 0x40000000,
};

my ($machine) = $Config{archname} =~ /^(x86_64|aarch64)/;

# Takes one connection and returns its descriptor; undef if none waits, -1 at end of file.  Dies on
# any error.
sub take {
    my ($channel) = @_;
    die "cannot call recvmsg on $Config{archname}\n" unless $machine && $Config{ptrsize} == 8;
    my ($header, $control, $vector) = ('', '');
    vec($header, 15, 8) = 0;     # unshared buffers, because the kernel writes to them
    vec($control, 23, 8) = 0;    # struct cmsghdr and one int: CMSG_LEN is 20 of these 24
    $vector = pack 'P Q', $header, 16;
    my $message = pack 'Q L x4 P Q P Q l x4', 0, 0, $vector, 1, $control, 20, 0;
    my $got = syscall($machine eq 'x86_64' ? 47 : 212, fileno $channel, $message,
        MSG_DONTWAIT_ | MSG_CMSG_CLOEXEC);
    if ($got < 0) {
        return undef if $! == EAGAIN || $! == EWOULDBLOCK || $! == EINTR;
        die "cannot take a connection: $!\n";
    }
    my ($bytes, $flags) = (unpack 'Q L x4 Q Q Q Q l', $message)[5, 6];
    return -1 if $got == 0 && $bytes == 0;
    die "a connection is lost: no descriptor left\n" if !$bytes && $flags & MSG_CTRUNC_;
    my ($version, $kind, $listener, undef, $accepted_at_ns) = unpack 'C C S< L< Q<', $header;
    my ($length, $level, $type, $fd) = unpack 'Q l l l', $control;
    die "cannot read a message of version $version\n" if $version != 1 || $kind != 1;
    return $fd;
}

sub notify {
    my ($lines) = @_;
    my $name = $ENV{NOTIFY_SOCKET} // return;
    $name =~ s/^@/\0/;
    socket my $line, AF_UNIX, SOCK_DGRAM, 0 or return;
    my $address = pack_sockaddr_un($name);
    # Perl pads the address with NULs, each of which would be part of an abstract name.
    $address = substr $address, 0, 2 + length $name if $name =~ /^\0/;
    # send() waits until the protector's queue has room, because READY=1 is sent only once.
    1 until defined send($line, $lines, MSG_NOSIGNAL_, $address) || $! != EINTR;
}

sub inherited {
    my ($name) = @_;
    open my $handle, '+<&=', $ENV{$name} or die "cannot use $name: $!\n";
    fcntl $handle, F_SETFD, FD_CLOEXEC;
    return $handle;
}

my $stopping = 0;
pipe my $wake, my $ring or die "cannot make a pipe: $!\n";
# With a pipe, because a signal right before select() would go unnoticed.
$SIG{TERM} = sub { $stopping = 1; syswrite $ring, "\0" };
$SIG{PIPE} = 'IGNORE';

sub wait_for {
    my $wanted = '';
    vec($wanted, fileno $_, 1) = 1 for @_, $wake;
    while (!$stopping) {
        my $found = select my $readable = $wanted, undef, undef, undef;
        return grep { vec $readable, fileno $_, 1 } @_ if $found > 0 && !$stopping;
    }
    return;
}

sub serve {
    my ($client) = @_;
    my $text = '';
    while (wait_for($client)) {
        sysread $client, $text, 65536, length $text or return;
        while ($text =~ s/^([^\n]*)\n//) {
            return if $1 eq 'quit';
            syswrite $client, "[$$] $1\n" or return;
        }
    }
}

if (!exists $ENV{SOCKETPROTECTOR_CHANNEL}) {
    my $listener = IO::Socket::IP->new(
        LocalPort => $ARGV[0], LocalHost => $ARGV[1], Listen => 4096, ReuseAddr => 1,
    ) or die "cannot listen: $@\n";
    while (wait_for($listener)) {
        my $client = $listener->accept or next;
        serve($client);
    }
    exit 0;
}

my $channel = inherited('SOCKETPROTECTOR_CHANNEL');
my $return = inherited('SOCKETPROTECTOR_RETURN');
notify("READY=1\nX_SOCKETPROTECTOR_RETIRE=1");
while (my @readable = wait_for($return, $channel)) {
    last if $readable[0] == $return && !sysread $return, my $nothing, 64;
    my $fd = take($channel) // next;    # another worker may have been quicker
    last if $fd < 0;
    open my $client, '+<&=', $fd or die "cannot use descriptor $fd: $!\n";
    serve($client);
}
