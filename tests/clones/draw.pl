use strict;
use warnings;
require "./renew.pl";

$| = 1;
while (my $line = <STDIN>) {
    if ($line eq "draw\n") { printf qq({"rand": %.17g}\n), rand() }
    else { renew(); print "null\n" }
}
