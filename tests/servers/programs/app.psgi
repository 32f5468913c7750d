# A PSGI application: each answer is the pid of who gives it, after WAIT_S.
use strict;
use warnings;

open my $release, '<', $ENV{RELEASE} or die "$ENV{RELEASE}: $!";
my $status = 0 + <$release>;
my $wait = $ENV{WAIT_S} || 0;
sub {
    select undef, undef, undef, $wait if $wait;
    my $body = "$$\n";
    return [$status, ['Content-Length' => length $body], [$body]];
};
