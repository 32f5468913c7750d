# A PSGI application: each answer is the pid of who gives it, after WAIT_S.
use strict;
use warnings;

my $wait = $ENV{WAIT_S} || 0;
sub {
    select undef, undef, undef, $wait if $wait;
    my $body = "$$\n";
    return [200, ['Content-Length' => length $body], [$body]];
};
