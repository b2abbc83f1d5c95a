import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.security.SecureRandom;
import java.util.Random;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;

class Draw {
    public static void main(String[] arguments) throws Exception {
        SecureRandom secure = new SecureRandom();
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = lines.readLine()) != null; System.out.flush()) {
            if (line.equals("draw")) {
                System.out.printf(
                    "{\"SecureRandom\": %d, \"UUID.randomUUID\": \"%s\", \"SHA1PRNG\": %d, \"DRBG\": %d, \"Random\": %d, "
                        + "\"Math.random\": %s, \"ThreadLocalRandom\": %d, \"new Random\": %d}%n",
                    secure.nextLong(), UUID.randomUUID(), Renew.SHA1.nextLong(), Renew.DRBG.nextLong(), Renew.RANDOM.nextLong(),
                    Math.random(), ThreadLocalRandom.current().nextLong(), new Random().nextLong());
            } else {
                Renew.renew();
                System.out.println("null");
            }
        }
    }
}
